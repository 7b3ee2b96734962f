import json


def format_parity(d):
    out = [f"{d['verdict']} {d['first_fault']}"]
    for c in d["checks"]:
        out.append(f"{c['name']} {c['ok']} {len(c['faults'])} {c['faults'][:2]}")
    return "\n".join(out)
