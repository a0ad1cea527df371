"""Attention by what is fastest for the shape and really runs on the machine: see ``table.py``."""

from pantheraml.kernels.attention.attend import attend as attend
from pantheraml.kernels.attention.backend import AttentionBackend as AttentionBackend
from pantheraml.kernels.attention.backend import AttentionCall as AttentionCall
from pantheraml.kernels.attention.layout import Layout as Layout
from pantheraml.kernels.attention.layout import read_layout as read_layout
from pantheraml.kernels.attention.table import choose as choose
