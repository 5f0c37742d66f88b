from ftb_llm.tracebacks import last_exception, one_line

ENGINE = """\
(EngineCore pid=17) ERROR 11-26 11:44:00 [core.py:1108] EngineCore failed to start.
(EngineCore pid=17) ERROR 11-26 11:44:00 [core.py:1108] Traceback (most recent call last):
(EngineCore pid=17) ERROR 11-26 11:44:00 [core.py:1108]   File "kv_cache_utils.py", line 6, in check
(EngineCore pid=17) ERROR 11-26 11:44:00 [core.py:1108] ValueError: To serve at least one request, 1 GiB is needed.
(EngineCore pid=17) ERROR 11-26 11:44:00 [core.py:1108] Lower max_model_len.
(EngineCore pid=17) Process EngineCore:
Traceback (most recent call last):
  File "async_llm.py", line 1, in start
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_engines_own_reason_is_found_behind_vllms_prefixes_and_its_whole_message_kept() -> None:
    assert last_exception(ENGINE) == "ValueError: To serve at least one request, 1 GiB is needed. Lower max_model_len."


def test_dotted_names_and_colors_are_exceptions_and_prose_is_none() -> None:
    assert last_exception("\x1b[31mpydantic_core.ValidationError: 1 problem\x1b[0m\n  it is wrong") == "pydantic_core.ValidationError: 1 problem it is wrong"
    assert last_exception("An Error happened: somewhere\nall is well") is None


def test_what_only_follows_from_another_exception_does_not_count() -> None:
    assert last_exception("KeyError: 'llama'\n\nTraceback (most recent call last):\nSystemExit: 1") == "KeyError: 'llama'"


def test_a_long_message_is_cut() -> None:
    assert len(one_line("word " * 1000)) < 610
