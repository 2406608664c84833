"""The ops as Triton kernels; imported only when a tensor needs them.

Three modules mirror those of `torch_impl`: `experts`, `grouped` and `head`. The others hold the kernels. Names in them:
N and K of a matrix product are its columns and its inner length, as usual; experts per token are PER_TOKEN there. A
slot is an assignment's position t · K + k in `ids_TK`; `slots` maps rows in expert order to it. z is the hidden layer
before its activation. E, F, D and T are as in `functional.py`.
"""
