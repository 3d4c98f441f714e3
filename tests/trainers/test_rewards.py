"""Scores of completions: which ids a reward model reads, where the score lands, how several rewards become one."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from helpers.ppo_trainer import PROMPTS, count_c
from helpers.text_tokenizers import text_tokenizer

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.functional import gae, token_rewards
from instructgpt_hf.models.scoring import TextRewardModel
from instructgpt_hf.trainers.ppo import rewards as rewards_module
from instructgpt_hf.trainers.ppo.rewards import OwnTokens, SampledIds, combined_scores, distinct

PAD, EOS, SECOND_EOS = 0, 1, 2
# Finished, empty, cut short, ended by a second EOS id, with a padding id inside, cut short behind a padding id.
COMPLETIONS = [[5, 6, EOS], [EOS], [5, 6, 7, 8, 9, 10], [7, SECOND_EOS], [5, PAD, 6, EOS], [5, 6, 7, 8, 9, PAD]]
TURNS = "{% for turn in messages %}{{ 'u ' if turn['role'] == 'user' else 'v ' }}{{ turn['content'] }}"
CHAT = TURNS + "<eos> z {% endfor %}{% if add_generation_prompt %}v {% endif %}"
# Ends a turn with a word of its own, as a base model's template with its tokenizer's <|endoftext|> as EOS.
CHAT_OTHER_END = TURNS + " y z {% endfor %}{% if add_generation_prompt %}v {% endif %}"


@pytest.fixture
def chat_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT
    return changed


@pytest.fixture
def other_tokenizer():
    """Other ids for the same words, other special tokens, a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", *[f"w{i}" for i in range(35)], *"zyxwvutsrqponmlkjihgfedcba", "[PAD]", "</s>"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        eos_token="</s>",
        unk_token="[UNK]",
        chat_template=TURNS + " </s> {% endfor %}{% if add_generation_prompt %}v {% endif %}",
    )


@pytest.fixture
def seen(monkeypatch):
    """The unpadded rows that reward models read."""
    rows, original = [], rewards_module.sequence_scores

    def watched(model, ids, mask):
        rows.extend(row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True))
        return original(model, ids, mask)

    monkeypatch.setattr(rewards_module, "sequence_scores", watched)
    return rows


def ending_policy(make_policy, *eos_token_ids):
    """A policy whose completions often end early, by any of some ids, and contain padding ids."""
    policy = make_policy()
    biased = torch.nn.Linear(policy.config.hidden_size, policy.config.vocab_size)
    with torch.no_grad():
        biased.weight.copy_(policy.lm_head.weight)
        biased.bias.zero_()
        biased.bias[[*eos_token_ids, PAD]] = 2.5
    policy.lm_head = biased
    policy.generation_config.eos_token_id = list(eos_token_ids)
    return policy


def sampled(batch):
    """Prompt and completion of every row, without padding."""
    return [
        [ids[row][mask[row].bool()].tolist() for ids, mask in (batch.tokens[:2], batch.tokens[2:])]
        for row in range(len(batch.tokens.prompt_ids))
    ]


def plain_score(model, ids):
    """At the last token; transformers' own pooling would skip a padding id that was sampled there."""
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()


class TestOneScore:
    rewards = torch.tensor([[1.0, 10.0], [2.0, math.nan], [math.nan, math.nan], [4.0, 40.0]])
    finished = torch.tensor([True, False, False, True])

    def score(self, weights=(1.0, 0.5), **changes):
        return combined_scores(self.rewards, torch.tensor(weights), self.finished, **changes).tolist()

    def test_weighted_sum_without_what_does_not_apply(self):
        assert self.score() == [6.0, 2.0, 0.0, 24.0]

    def test_clip(self):
        assert self.score(clip_range=[1.0, 7.0]) == [6.0, 2.0, 1.0, 7.0]

    def test_penalty_is_subtracted_from_unfinished_completions_after_the_clip(self):
        assert self.score(clip_range=[1.0, 7.0], missing_eos_penalty=2.5) == [6.0, -0.5, -1.5, 7.0]

    @pytest.mark.parametrize("score", [-1.0, 0.0, 30.0])
    def test_score_replaces_that_of_unfinished_completions(self, score):
        assert self.score(clip_range=[1.0, 7.0], missing_eos_score=score) == [6.0, score, score, 7.0]


def test_names_are_distinct():
    assert distinct(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]


@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("eos_token_ids", [(EOS,), (EOS, SECOND_EOS)])
def test_reward_model_sees_the_sampled_ids_and_its_score_lands_on_the_last(
    make_trainer, make_policy, make_scorer, chat_tokenizer, seen, template, eos_token_ids
):
    """With padding on both sides, prompts of two lengths, padding ids that were sampled, and one or two EOS ids."""
    reward_model = make_scorer(seed=5)
    trainer = make_trainer(
        reward=reward_model,
        policy=ending_policy(make_policy, *eos_token_ids),
        tokenizer=chat_tokenizer,
        template=template,
        beta=0.0,
        gamma=0.5,
        lam=1.0,
        whiten_advantages=False,
    )
    trainer.model.train()
    batch = trainer.rollout([PROMPTS[index] for index in range(32)])
    rows = sampled(batch)
    assert sorted(seen) == sorted(prompt + completion for prompt, completion in rows)
    ends = {completion[-1] if completion[-1] in eos_token_ids else None for _, completion in rows}
    assert ends == {*eos_token_ids, None}, "completions end in every way"
    assert any(len(completion) == 1 for _, completion in rows) and any(PAD in completion for _, completion in rows)
    assert not any(token in eos_token_ids for _, completion in rows for token in completion[:-1])
    for row, (prompt, completion) in enumerate(rows):
        rendered = trainer.prompt_format.prompt_ids(PROMPTS[row]["prompt"], chat_tokenizer)
        assert prompt == rendered
        score = plain_score(reward_model, prompt + completion)
        # The discounted return of a token says how far behind it the score is.
        expected = [score * 0.5 ** (len(completion) - 1 - place) for place in range(len(completion))]
        assert batch.returns[row, : len(completion)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not batch.returns[row, len(completion) :].any()


@pytest.mark.parametrize("correction", [{}, {"missing_eos_penalty": 2.0}, {"missing_eos_score": -1.0}])
def test_completions_of_every_shape(make_trainer, make_policy, monkeypatch, correction):
    """The score lands on the last token that was sampled, whatever its id; any EOS id finishes a completion."""
    policy = make_policy()
    policy.generation_config.eos_token_id = [EOS, SECOND_EOS]
    trainer = make_trainer(
        reward=lambda completion_ids, **_: [10.0 + row for row in range(len(completion_ids))],
        policy=policy,
        beta=0.0,
        gamma=0.5,
        lam=1.0,
        whiten_advantages=False,
        **correction,
    )
    trainer.model.train()
    prompts = [[3, 4, 38], [5, 38]] * 3
    monkeypatch.setattr(trainer, "generate", lambda _: (prompts, COMPLETIONS, [""] * 6))
    batch = trainer.rollout([PROMPTS[index] for index in range(6)])
    for row, completion in enumerate(COMPLETIONS):
        score = 10.0 + row
        if row in (2, 5):
            score = correction.get("missing_eos_score", score) - correction.get("missing_eos_penalty", 0.0)
        returns = batch.returns[row]
        assert returns[len(completion) - 1].item() == pytest.approx(score)
        assert returns[: len(completion)].tolist() == pytest.approx(
            [score * 0.5 ** (len(completion) - 1 - place) for place in range(len(completion))]
        )
        assert not returns[len(completion) :].any()


@pytest.mark.parametrize("messages", [False, True])
def test_functions_read_what_the_prompt_format_did_not_write(make_trainer, chat_tokenizer, monkeypatch, messages):
    seen = []

    def keep(completions, **_):
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(reward=keep, tokenizer=chat_tokenizer, template="chat")
    monkeypatch.setattr(PromptFormat, "completion_text", lambda *_: "  x\n")
    rows = [{"prompt": [{"role": "user", "content": "a"}] if messages else "a"}] * 4
    trainer.rollout(rows)
    assert seen == [[{"role": "assistant", "content": "  x\n"}] if messages else "  x\n"] * 4


def test_score_is_shifted(make_trainer, make_scorer):
    reward_model = make_scorer(seed=5)
    reward_model.config.reward_shift = 0.25
    trainer = make_trainer(reward=reward_model)
    scores = trainer.reward_funcs[0](prompts=["a b", "c"], completion_ids=[[5, 6, EOS], [7, EOS]])
    expected = [plain_score(reward_model, ids) - 0.25 for ids in ([3, 4, 5, 6, EOS], [5, 7, EOS])]
    assert scores == pytest.approx(expected, abs=1e-5)


class TestChatTemplateWhoseTurnsEndWithAnotherToken:
    """SFT data, prompts and sampling agree: the tokenizer's EOS ends a completion, behind the template's own end."""

    def test_training_and_sampling_end_alike(self, make_trainer, make_policy, tokenizer):
        from instructgpt_hf.models.loading import set_policy_tokens

        changed = copy.deepcopy(tokenizer)
        changed.chat_template = CHAT_OTHER_END
        made = PromptFormat.create("chat", changed)
        end = changed.convert_tokens_to_ids("y")
        assert made.completion_ids("a", "b", changed) == [*changed("b y z")["input_ids"], EOS]
        policy = ending_policy(make_policy, end, EOS)  # as a chat model declares its two
        set_policy_tokens(policy, changed)  # what every stage does to the models it loads
        trainer = make_trainer(policy=policy, tokenizer=changed, template="chat")
        assert trainer.eos_token_ids == [EOS]
        trainer.model.train()
        completions = [
            completion for _, completion in sampled(trainer.rollout([PROMPTS[index] for index in range(32)]))
        ]
        assert any(end in completion[:-1] for completion in completions), (
            "the template's end of turn does not end a completion"
        )
        assert all(completion[-1] == EOS or len(completion) == 6 for completion in completions)


class TestAnotherTokenizer:
    def expected(self, tokenizer, prompt, completion, finished):
        text = f"u {prompt} </s> v {completion}" + (" </s>" if finished else "")
        return tokenizer(text)["input_ids"]

    def test_text_is_rendered_in_the_models_own_way(self, make_trainer, make_scorer, tokenizer, other_tokenizer, seen):
        """Finished completions end with the model's own EOS, others with their last word, without special tokens."""
        reward_model = make_scorer(seed=5)
        reward_model.config.reward_shift = 0.5
        trainer = make_trainer(reward=TextRewardModel(reward_model, other_tokenizer))
        prompts, completions = ["a b", "c", "d", "e"], [[6, 7, EOS], [EOS], [6, 7, 8, 9, 10, 11], [PAD] * 6]
        scores = trainer.reward_funcs[0](prompts=prompts, completion_ids=completions)
        texts = ["d e", "", "d e f g h i", ""]
        expected = [
            self.expected(other_tokenizer, *row)
            for row in zip(prompts, texts, [True, True, False, False], strict=True)
        ]
        assert expected[0] == other_tokenizer.convert_tokens_to_ids(["u", "a", "b", "</s>", "v", "d", "e", "</s>"])
        assert sorted(seen) == sorted(expected)
        assert scores == pytest.approx([plain_score(reward_model, ids) - 0.5 for ids in expected], abs=1e-5)

    def test_plain_template_of_its_own(self, make_trainer, make_scorer, other_tokenizer, seen):
        made = PromptFormat.create("user-assistant", other_tokenizer)
        trainer = make_trainer(reward=TextRewardModel(make_scorer(), other_tokenizer, made))
        trainer.reward_funcs[0](prompts=["a b"], completion_ids=[[6, EOS]])
        assert seen == [other_tokenizer("User: a b\nAssistant: d </s>")["input_ids"]]

    @pytest.mark.parametrize("text", ["    return x\n", "\n\nSo. ", "It says <end>.", ""])
    def test_white_space_stays(self, make_scorer, text):
        """Only what the policy's prompt format wrote is left out, and the model's own format writes what it writes."""
        ours, own = text_tokenizer("bytes"), text_tokenizer("legacy")
        policy = SampledIds(PromptFormat.create("user-assistant", ours), ours, [ours.eos_token_id])
        made = PromptFormat.create("instruction", own)
        reader = OwnTokens(policy, TextRewardModel(make_scorer(vocab_size=len(own)), own, made))
        ids = [policy.prompt_format.completion_ids("Why?", text, ours, finished=end) for end in (True, False)]
        assert policy.texts(["Why?"] * 2, ids) == [text] * 2
        whole, mask, _ = reader(["Why?"] * 2, ids).joined()
        seen = [row[kept].tolist() for row, kept in zip(whole, mask.bool(), strict=True)]
        prompt = made.prompt_ids("Why?", own)
        assert seen == [prompt + made.completion_ids("Why?", text, own, finished=end) for end in (True, False)]

    def test_messages(self, make_trainer, make_scorer, chat_tokenizer, other_tokenizer, seen):
        trainer = make_trainer(
            reward=TextRewardModel(make_scorer(), other_tokenizer), tokenizer=chat_tokenizer, template="chat"
        )
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        trainer.reward_funcs[0](prompts=[[*turns, {"role": "user", "content": "c"}]], completion_ids=[[6, 7]])
        assert seen == [other_tokenizer("u a </s> v b </s> u c </s> v d e")["input_ids"]]

    def test_more_tokens_than_positions_are_an_error_that_says_so(self, make_trainer, make_scorer, other_tokenizer):
        reward_model = make_scorer("gpt2", n_positions=8)
        trainer = make_trainer(reward=TextRewardModel(reward_model, other_tokenizer))
        trainer.reward_funcs[0](prompts=["a b"], completion_ids=[[6, 7, EOS]])
        with pytest.raises(InstructGPTError, match=r"reward_model: .* has 9 of .* 8 positions.*max_completion_length"):
            trainer.reward_funcs[0](prompts=["a b"], completion_ids=[[6, 7, 8, EOS]])

    def test_trains(self, make_trainer, make_scorer, other_tokenizer):
        reward_model = make_scorer(seed=5)
        before = copy.deepcopy(reward_model.state_dict())
        trainer = make_trainer(reward=TextRewardModel(reward_model, other_tokenizer))
        trainer.train()
        assert not any(item.requires_grad for item in reward_model.parameters())
        assert all(torch.equal(item, before[name]) for name, item in reward_model.state_dict().items())

    def test_needs_a_format(self, make_scorer, tokenizer):
        with pytest.raises(InstructGPTError, match="needs a chat template"):
            TextRewardModel(make_scorer(), tokenizer)


class TestSeveral:
    def test_weights_names_columns_and_the_log(self, make_trainer, make_scorer):
        """Two reward models, a function that reads a column and does not always apply, and their weighted sum."""
        models = [make_scorer(seed=5), make_scorer(seed=6)]
        kept = []

        def close(completion_ids, target, **_):
            rows = zip(completion_ids, target, strict=True)
            found = [None if wanted == 0 else -abs(len(ids) - wanted) for ids, wanted in rows]
            kept.append((completion_ids, found))
            return found

        prompts = Dataset.from_dict({"prompt": PROMPTS["prompt"], "target": [index % 4 for index in range(64)]})
        trainer = make_trainer(
            reward=[*models, close], prompts=prompts, reward_weights=[1.0, 0.5, 0.25], total_episodes=16, beta=0.0
        )
        assert trainer.reward_func_names == ["reward_model", "reward_model_2", "close"]
        batches = []
        original = trainer.rollout
        trainer.rollout = lambda inputs: batches.append(original(inputs)) or batches[-1]
        trainer.train()
        record = trainer.state.log_history[0]
        ((completions, found),) = kept
        rows = [prompt + completion for prompt, completion in sampled(batches[0])]
        assert [completion for _, completion in sampled(batches[0])] == completions
        by_model = [sum(plain_score(model, row) for row in rows) / 16 for model in models]
        applying = [value for value in found if value is not None]
        assert 0 < len(applying) < 16
        assert record["rewards/reward_model"] == pytest.approx(by_model[0], abs=1e-5)
        assert record["rewards/reward_model_2"] == pytest.approx(by_model[1], abs=1e-5)
        assert record["rewards/close"] == pytest.approx(sum(applying) / len(applying))
        total = by_model[0] + 0.5 * by_model[1] + 0.25 * sum(applying) / 16
        assert record["objective/scores"] == pytest.approx(total, abs=1e-5)

    def test_a_reward_that_never_applies_is_not_logged(self, make_trainer):
        trainer = make_trainer(reward=[count_c, lambda prompts, **_: [None] * len(prompts)], total_episodes=16)
        trainer.train()
        names = [name for name in trainer.state.log_history[0] if name.startswith("rewards/")]
        assert names == ["rewards/count_c"]


def test_what_a_function_logs_is_logged_once(make_trainer):
    """Also in the second iteration, which must not see the first one's values."""

    def chatty(completions, log_metric, log_extra, trainer_state, **_):
        log_metric("mine/step", float(trainer_state.global_step))
        log_metric("mine/step", float(trainer_state.global_step) + 1)
        log_extra("words", [len(text.split()) for text in completions])
        return [0.0] * len(completions)

    trainer = make_trainer(reward=chatty)
    trainer.train()
    assert [record["mine/step"] for record in trainer.state.log_history[:2]] == [0.5, 2.5]
    assert len(trainer._logs["extra"]["words"]) == 16, "those of the last iteration"


def test_the_definitions_agree_with_the_rollout(make_trainer, make_scorer):
    """Score, KL and GAE of a rollout with several rewards are those of the formulas."""
    trainer = make_trainer(reward=[make_scorer(seed=5), count_c], beta=0.1, whiten_advantages=False)
    trainer.model.train()
    batch = trainer.rollout([PROMPTS[index] for index in range(16)])
    scores = torch.tensor(
        [
            plain_score(trainer.reward_funcs[0].model, prompt + completion) + completion.count(5)
            for prompt, completion in sampled(batch)
        ]
    )
    rewards = token_rewards(scores, torch.zeros_like(batch.logps), batch.tokens.completion_mask, 0.1)
    advantages, _ = gae(rewards, batch.values, batch.tokens.completion_mask, 1.0, 0.95)
    torch.testing.assert_close(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
