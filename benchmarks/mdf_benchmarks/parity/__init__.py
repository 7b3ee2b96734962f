"""`mdf parity`: an engine held against its checkpoint in PyTorch, and a certificate of it.

`certificate.py` needs the SDK alone; the rest needs PyTorch, which is the reference.
"""
