"""`PPOTrainer.push_to_hub`, as users of the Trainer call it."""

import pytest
import transformers.trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


class Hub:
    """Notes what a trainer asks of the Hub."""

    def __init__(self):
        self.private, self.uploads = None, []

    def create_repo(self, name, token=None, private=None, exist_ok=False):
        self.private = private
        return type("Url", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, folder_path, ignore_patterns, **_):
        self.uploads.append((folder_path, ignore_patterns))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: hub)
    return hub


def test_it_pushes_models_that_load_alone(hub, make_trainer, tmp_path):
    trainer = make_trainer(output_dir=tmp_path, total_episodes=16, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub()
    ((folder, ignored),) = hub.uploads
    assert folder == str(tmp_path) and "checkpoint-*" in ignored
    names = {item.name for item in tmp_path.iterdir() if item.is_file()}
    assert not names & {"trainable.safetensors", "ppo_state.json", "training_args.bin"}
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
