"""All losses as functions of tensors; `from prefopt.losses import ...` requires torch only."""

from prefopt.methods.dpo import dpo as dpo
from prefopt.methods.pairwise_judge import pairwise_judge as pairwise_judge
from prefopt.methods.reward_model import reward_model as reward_model
from prefopt.methods.sft import sft as sft
from prefopt.methods.sppo import sppo as sppo
from prefopt.methods.tdpo import tdpo as tdpo
