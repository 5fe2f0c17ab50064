"""Those who look on while a weight is computed: compilers and transforms (`capture.py`), and TorchScript.

The rest of the package asks of each whether it looks on, and leaves to it what is to be done then. So each can be
deleted in one piece: constants in its place are all that eager mode needs.
"""
