"""The commands `mdf predict`, `mdf info`, `mdf verify`, `mdf doctor` and `mdf sign`."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mdf_sdk.extras import import_extra

# The commands' own needs load when one runs, so that `mdf --help` stays quick.
if TYPE_CHECKING:
    from mdf_sdk.manifest import Manifest
    from mdf_sdk.memory import MemoryPlan

Subparsers = Any  # argparse has no public name for what add_subparsers returns


def add_predict(subparsers: Subparsers) -> None:
    """Register `mdf predict`."""
    parser = subparsers.add_parser("predict", help="classify a photograph with its clinical text")
    parser.add_argument("engine", metavar="ENGINE", help="an engine directory")
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("--text", required=True, metavar="T", help="the clinical text")
    parser.add_argument(
        "--frame", type=int, metavar="N", help="which picture of a multi-frame file, from 0"
    )
    parser.add_argument("--mask", action="store_true", help="also segment the photograph")
    parser.add_argument("--evidence", action="store_true", help="also map what spoke for the label")
    parser.add_argument(
        "--picture", metavar="OUT", help="save photograph, mask and evidence side by side"
    )
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="on a card, no kernel that is chosen by its time; slower for INT4",
    )
    _add_key(parser)
    _add_device_and_json(parser)
    parser.set_defaults(run=_predict)


def add_info(subparsers: Subparsers) -> None:
    """Register `mdf info`."""
    parser = subparsers.add_parser("info", help="say what an engine is")
    parser.add_argument("engine", metavar="ENGINE", help="an engine directory")
    _add_json(parser)
    parser.set_defaults(run=_info)


def add_verify(subparsers: Subparsers) -> None:
    """Register `mdf verify`."""
    parser = subparsers.add_parser(
        "verify", help="check an engine's files and its numbers on this machine"
    )
    parser.add_argument("engine", metavar="ENGINE", help="an engine directory")
    _add_key(parser)
    _add_device_and_json(parser)
    parser.set_defaults(run=_verify)


def add_sign(subparsers: Subparsers) -> None:
    """Register `mdf sign`."""
    parser = subparsers.add_parser("sign", help="check an engine's files and sign its manifest")
    parser.add_argument("engine", metavar="ENGINE", help="an engine directory")
    parser.add_argument(
        "--key", required=True, metavar="PRIVATE", help="an Ed25519 private key (PEM)"
    )
    _add_json(parser)
    parser.set_defaults(run=_sign)


def add_doctor(subparsers: Subparsers) -> None:
    """Register `mdf doctor`."""
    parser = subparsers.add_parser(
        "doctor", help="say of every backend whether it works here, or why not and what cures it"
    )
    parser.add_argument(
        "engine", metavar="ENGINE", nargs="?", help="an engine directory to try them with"
    )
    _add_json(parser)
    parser.set_defaults(run=_doctor)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print a JSON document as the last line"
    )


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        metavar="PUBLIC",
        help="refuse an engine that this Ed25519 key (PEM) has not signed",
    )


def _add_device_and_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto (default), tensorrt, cuda or cpu"
    )
    _add_json(parser)


def _predict(args: argparse.Namespace) -> int:
    from mdf_sdk.classifier import MDFClassifier
    from mdf_sdk.photograph import load_image
    from mdf_sdk.picture import check_picture_path, save_picture

    wants_picture = args.picture is not None
    if wants_picture:
        check_picture_path(args.picture, args.image)
    image = args.image if args.frame is None else load_image(args.image, args.frame)
    with MDFClassifier(
        args.engine,
        device=args.device,
        reproducible=args.reproducible,
        trusted_key=args.key,
    ) as classifier:
        prediction = classifier.predict(
            image,
            args.text,
            mask=args.mask or wants_picture,
            evidence=args.evidence or wants_picture,
        )
    print(prediction)
    if wants_picture:
        save_picture(args.picture, image, prediction)
        print(f"  picture {args.picture}")
    if args.json:
        _print_json(prediction.to_dict())
    return 0


def _info(args: argparse.Namespace) -> int:
    from mdf_sdk.manifest import load_manifest

    manifest = load_manifest(args.engine)
    memory = _memory(manifest)
    print(_describe(args.engine, manifest, memory))
    if args.json:
        needs = {p.device: asdict(p) | {"total_bytes": p.total_bytes} for p in memory}
        _print_json(asdict(manifest) | {"memory": needs})
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mdf_sdk.verify import verify_engine

    report = verify_engine(args.engine, args.device, args.key)
    print(report)
    if args.json:
        _print_json(report.to_dict())
    return 0 if report.ok else 1


def _sign(args: argparse.Namespace) -> int:
    from mdf_sdk.manifest import SIGNATURE_NAME

    fingerprint = import_extra("mdf_sdk.signature", "sign").sign_engine(args.engine, args.key)
    print(f"{args.engine}: {SIGNATURE_NAME} is by the key with SHA-256 {fingerprint}")
    if args.json:
        _print_json({"engine": args.engine, "signed_by": fingerprint})
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from mdf_sdk.doctor import diagnose

    diagnosis = diagnose(args.engine)
    print(diagnosis)
    if args.json:
        _print_json(diagnosis.to_dict())
    return 0 if diagnosis.ok else 1


def _memory(manifest: "Manifest") -> list["MemoryPlan"]:
    """Tell what the engine needs of every device that it was built for."""
    from mdf_sdk.manifest import PROCESSORS_ALONE
    from mdf_sdk.memory import required_bytes

    devices = ["cpu"]
    if manifest.precision not in PROCESSORS_ALONE:
        devices += ["cuda", "tensorrt"] if manifest.plans else ["cuda"]
    return [required_bytes(manifest, device) for device in devices]


def _describe(engine_dir: str, manifest: "Manifest", memory: list["MemoryPlan"]) -> str:
    megabytes = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    precisions = ", ".join(f"{name} {block.precision}" for name, block in manifest.blocks.items())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.built_with.items())
    quantization = manifest.quantization
    how: str = quantization.method
    if how != "none":
        size = quantization.block_size
        how += f", blocks of {size}" if size else ", one scale for each output feature"
        how += f", calibrated on {quantization.calibration}" if quantization.calibration else ""
        how += f", {len(quantization.kept)} linears kept finer" if quantization.kept else ""
    lines = [
        f"{engine_dir}: {manifest.model} {manifest.precision}, {megabytes:.1f} MB",
        f"  labels      {', '.join(manifest.labels)} (temperature {manifest.temperature:g})",
        f"  masks       {', '.join(manifest.mask_kinds) or 'none'}",
        f"  blocks      {precisions}",
        f"  quantized   {how}",
        f"  pixels      {manifest.image.tower_px} tower, {manifest.image.unet_px} U-Net",
        f"  text        at most {manifest.prompt.max_text_tokens} tokens",
        f"  built with  {versions}",
        f"  checkpoint  {manifest.checkpoint}",
    ]
    lines += [f"  memory      {plan.summary}" for plan in memory]
    lines += [
        f"  plan        {plan.file}: {plan.builder}, cards {', '.join(plan.compute_capabilities)}, "
        f"{manifest.files[plan.file].bytes / 1e6:.1f} MB"
        for plan in manifest.plans
    ]
    if manifest.notice:
        lines.append(f"  notice      {manifest.notice}")
    return "\n".join(lines)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, allow_nan=False))
