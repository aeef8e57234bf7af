"""Configurations: one frozen dataclass per kind of run. Its fields are the options of the command line.

Nothing here imports torch: `dni-rnn --help` reads these modules.
"""

from dni_rnn.config.base import Preset, RunConfig, from_json, to_json
from dni_rnn.config.feedforward import FeedforwardConfig
from dni_rnn.config.recurrent import PUBLISHED_DNI, RecurrentConfig

__all__ = [
    "PUBLISHED_DNI",
    "FeedforwardConfig",
    "Preset",
    "RecurrentConfig",
    "RunConfig",
    "from_json",
    "to_json",
]
