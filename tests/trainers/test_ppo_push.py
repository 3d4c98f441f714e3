"""`PPOTrainer.push_to_hub`, as users of the Trainer call it."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def test_it_pushes_models_that_load_alone(hub, make_trainer, tmp_path):
    trainer = make_trainer(output_dir=tmp_path, total_episodes=16, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub()
    ((folder, ignored),) = hub.uploads
    assert folder == str(tmp_path) and "checkpoint-*" in ignored
    names = {item.name for item in tmp_path.iterdir() if item.is_file()}
    assert not names & {"trainable.safetensors", "ppo_state.json", "training_args.bin"}
    assert "_*" in ignored and "_rollouts.jsonl" in names and "rollouts.jsonl" not in names  # prompts and answers stay
    AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(f"{folder}/value_model", num_labels=1)


@pytest.mark.parametrize(("setting", "private"), [(None, True), (True, True), (False, False)])
def test_a_repository_is_private_unless_told_otherwise(hub, make_trainer, tmp_path, setting, private):
    trainer = make_trainer(output_dir=tmp_path, hub_private_repo=setting, push_to_hub=True)
    assert hub.private is private, "with push_to_hub the Trainer makes the repository at once"
    trainer.push_to_hub()
    assert hub.private is private


def test_nothing_is_pushed_at_a_checkpoint(hub, make_trainer):
    make_trainer(total_episodes=32, save_strategy="steps", save_steps=2, push_to_hub=True).train()
    assert not hub.uploads
