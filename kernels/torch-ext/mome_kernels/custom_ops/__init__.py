"""The torch ops of this package: functional and differentiable, with the same meaning on every device.

Forward and backward are separate ops, so that compile, export and activation checkpointing see each of them as one
node. Nothing is mutated, and results are contiguous whatever the layout of the inputs. A schema of torch.library holds
flat arguments only: the modules here flatten `ExpertWeights` and `HeadWeights` at that boundary and rebuild them.
"""
