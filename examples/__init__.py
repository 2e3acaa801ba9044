"""Other uses of a differentiable top-k, each one command on real data: see docs/uses.md.

They use `isotonic`, `routers` and `moe` as a reader would; nothing there knows of them.
"""
