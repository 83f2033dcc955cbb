"""Options that become `SamplingParams`, under its fields' names."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from mor.cli.options.config_options import OptionGroup, add_field_options, field_values
from mor.model.sampling import SamplingParams


def add_sampling_options(
    p: OptionGroup,
    names: Iterable[str],
    *,
    helps: Mapping[str, str] = MappingProxyType({}),
    **defaults: Any,
) -> None:
    """Add an option for each named field of `SamplingParams`.

    Args:
        helps: what a verb says instead of a field's docstring.
        defaults: of this verb, where they are not those of the fields.
    """
    add_field_options(p, SamplingParams, names, defaults=defaults, helps=helps)


def sampling_params(options: Any, **values: Any) -> SamplingParams:
    """The parameters that the options of a verb make, with values of the verb's own.

    Raises:
        RequestError: a value is out of its range; the message names the field.
    """
    return SamplingParams(**(field_values(options, SamplingParams) | values))
