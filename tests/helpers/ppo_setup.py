"""The tiny PPO trainer of this folder for scripts: two optimizer steps an iteration, four iterations a pass."""

from helpers import ppo_trainer
from helpers.ppo_trainer import PROMPTS, TEXT, count_c

__all__ = ["PROMPTS", "TEXT", "build_trainer", "count_c", "records"]


def build_trainer(tokenizer, policy, value_model, folder, reward=count_c, **changes):
    """`ppo_trainer.build_trainer` for one pass of the prompts."""
    return ppo_trainer.build_trainer(
        policy, reward, value_model, tokenizer, str(folder), **{"total_episodes": 64, **changes}
    )


def records(trainer):
    """The log's records of iterations."""
    return [record for record in trainer.state.log_history if "objective/kl" in record]
