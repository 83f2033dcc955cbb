"""Options that verbs share, in reading order.

parser             the parser of all verbs: an error is one sentence, and names the nearest option
config_options     one option for each field of a config: flag = field, help = docstring
engine_options     those of `EngineConfig`, and the choice of a device
sampling_options   those of `SamplingParams`
model_options      opening the model that MODEL names
overrides          `--model.FIELD VALUE`, and values as YAML reads them
"""
