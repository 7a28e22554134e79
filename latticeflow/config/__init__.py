"""Run configurations: schema, loading, and building the objects they describe."""

from latticeflow.config.loading import load_config
from latticeflow.config.problems import ConfigError
from latticeflow.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config"]
