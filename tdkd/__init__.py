"""tdkd: temporal-difference distillation of language models as PyTorch ops.

``from tdkd import ops`` for the ops, ``from tdkd import objectives`` for what they minimise,
``from tdkd import nn`` for modules; ``tdkd.trainer`` needs ``pip install "tdkd[train]"``.
"""

__version__ = "0.1.0"
