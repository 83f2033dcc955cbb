"""MoR models as classes of `transformers`; `import mor.io.hf` registers them with its auto classes.

    configuration  MoRPretrainedConfig: the fields of MoRConfig as a PretrainedConfig
    padded_tokens  PaddedTokens: which tokens of a padded batch are computed
    cache          MoRCache: keys and values by (depth, layer) during `generate`
    modeling       MoRForCausalLM: forward, losses, generate
    auto_model     MoRForCausalLM where mor is installed: what it saves loads where mor is not

Needs the extra `hf`. Writing a folder that `transformers` loads needs no `transformers`: that is
`mor.io.hf_export`.
"""

from mor.errors import MissingExtraError

try:
    from transformers import AutoConfig, AutoModelForCausalLM

    from mor.io.hf.auto_model import MoRForCausalLM
    from mor.io.hf.configuration import MoRPretrainedConfig
except ImportError as error:  # missing, or older than 4.57
    raise MissingExtraError("transformers>=4.57", "hf") from error


def register() -> None:
    """Have `AutoConfig` and `AutoModelForCausalLM` load folders of `model_type` "mor".

    Importing this module has called it already; calling it again changes nothing.
    """
    AutoConfig.register(MoRPretrainedConfig.model_type, MoRPretrainedConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoRPretrainedConfig, MoRForCausalLM, exist_ok=True)


register()
