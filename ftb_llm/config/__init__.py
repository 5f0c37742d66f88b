"""The config: its schema, how it is loaded, and the ledger of its versions while a run is alive."""

from ftb_llm.config.load import build_config, load_config
from ftb_llm.config.schema import Config

__all__ = ["Config", "build_config", "load_config"]
