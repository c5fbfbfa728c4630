"""The model: a MinGRU language model over bytes; knows nothing of training or of peers."""

from mingru.minGRU import minGRU
from mingru.minLM import MinLM, ModelConfig

__all__ = ["MinLM", "ModelConfig", "minGRU"]
