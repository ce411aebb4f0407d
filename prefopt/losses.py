"""The losses as plain functions of tensors: `from prefopt.losses import ...` needs torch alone."""

from prefopt.methods.dpo import dpo as dpo
from prefopt.methods.sft import sft as sft
from prefopt.methods.sppo import sppo as sppo
from prefopt.methods.tdpo import tdpo as tdpo
