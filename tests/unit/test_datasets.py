import json
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.config import build_config
from ftb_llm.datasets import PromptOrder, load_prompts, to_prompt
from ftb_llm.errors import ConfigError, FtbError
from tests.fakes import make_prompt


class WordTokenizer:
    """One token per word; a chat template that tags the roles."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        text = " ".join(f"<{message['role']}> {message['content']}" for message in conversation) + (" <assistant>" if add_generation_prompt else "")
        return {"input_ids": self.encode(text)} if tokenize else text


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **settings: Any):
    return load_prompts(build_config({"sampling": {"max_tokens": 8}, "actors": {"max_model_len": 16}} | settings), path, WordTokenizer())


def test_text_prompts_and_their_columns(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "one two", "answer": 3}, {"prompt": "three", "answer": 4})
    first, second = load(path)
    assert (first.index, first.text, first.token_ids, first.columns, first.messages) == (0, "one two", (3, 3), {"answer": 3}, None)
    assert second.columns == {"answer": 4}


def test_parquet_is_read_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["one"], "gold": [1.5]}), tmp_path / "a.parquet")
    (prompt,) = load(str(tmp_path / "a.parquet"))
    assert prompt.text == "one" and prompt.columns == {"gold": 1.5}


def test_a_conversation_goes_through_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    (prompt,) = load(write_rows(tmp_path / "a.jsonl", {"prompt": messages}))
    assert prompt.text == "<user> hi <assistant>"
    assert prompt.token_ids == (6, 2, 11)
    assert prompt.messages == messages


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "ok"}, {"prompt": ""}], "row 1: the prompt is empty; it must have at least one token"),
        ([{"prompt": "   "}], "row 0: the prompt is empty; it must have at least one token"),
        ([{"question": "x"}], r"columns \['question'\] but no prompt column"),
        ([{"prompt": 3}], "row 0: prompt is 3; it must be text or a list of messages"),
        (
            [{"prompt": "ok"}, {"prompt": "a b c d e f g h i"}],
            "row 1: the prompt has 9 tokens, but actors.max_model_len 16 less sampling.max_tokens 8 leaves 8",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, rows, message):
    with pytest.raises(FtbError, match=message) as caught:
        load(write_rows(tmp_path / "a.jsonl", *rows))
    assert "data.path" in str(caught.value)


def test_an_empty_prompt_is_refused_even_where_the_tokenizer_marks_its_beginning():
    class Marking(WordTokenizer):
        def encode(self, text: str) -> list[int]:
            return [1, *super().encode(text)]

    with pytest.raises(ConfigError, match=r"data\.path: row 4: the prompt is empty"):
        to_prompt(4, {"prompt": ""}, Marking())


def test_a_missing_file_is_named():
    with pytest.raises(FtbError, match=r"data.path: nowhere.jsonl no such file"):
        load("nowhere.jsonl")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{not json\n")
    with pytest.raises(FtbError, match=r"data.path: .*a.jsonl can't be read"):
        load(str(tmp_path / "a.jsonl"))


def test_each_epoch_visits_every_prompt_once_in_an_order_of_its_own():
    order = PromptOrder([make_prompt(index) for index in range(20)], seed=3, shuffle=True)
    epochs = [[order[20 * epoch + place].index for place in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone():
    prompts = [make_prompt(index) for index in range(20)]
    forward = PromptOrder(prompts, seed=3, shuffle=True)
    backward = PromptOrder(prompts, seed=3, shuffle=True)
    assert [forward[n].index for n in range(60)] == [backward[n].index for n in reversed(range(60))][::-1]
    assert [PromptOrder(prompts, seed=4, shuffle=True)[n].index for n in range(20)] != [forward[n].index for n in range(20)]


def test_without_shuffle_the_file_order_stays():
    order = PromptOrder([make_prompt(index) for index in range(3)], seed=0, shuffle=False)
    assert [order[n].index for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]
