"""`mdf parity`: an engine held against its checkpoint in PyTorch; a certificate of it, checked anywhere.

`certificate.py` needs the SDK alone; the rest needs PyTorch, which is the reference.
"""
