"""Spares tests what Beam works out anew for each transform of each small pipeline.

Most of a tiny job's time are things that depend on code alone: the signatures of DoFns' methods,
whether they have state, what those of ours return, and the parsers of options. They are remembered
here; what they are does not change.
"""

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import core, userstate
from apache_beam.typehints import trivial_inference

_OURS = "feature_jobs."


def remember(patch: pytest.MonkeyPatch) -> None:
    """Makes Beam, in this process, look at each method and each set of options once."""
    patch.setattr(core, "get_function_args_defaults", _by_method(core.get_function_args_defaults))
    patch.setattr(userstate, "get_dofn_specs", _by_class(userstate.get_dofn_specs))
    patch.setattr(
        trivial_inference, "infer_return_type", _by_types(trivial_inference.infer_return_type)
    )
    patch.setattr(PipelineOptions, "__init__", _by_flags(PipelineOptions.__init__))


def _by_method(real: Callable[[Any], tuple[list, list]]) -> Callable[[Any], tuple[list, list]]:
    @functools.cache
    def of_method(function: Any) -> tuple[list, list]:
        return real(types.MethodType(function, object()))

    def arguments(f: Any) -> tuple[list, list]:
        if not isinstance(f, types.MethodType):
            return real(f)
        names, defaults = of_method(f.__func__)
        return list(names), list(defaults)

    return arguments


def _by_class(real: Callable[[Any], tuple[set, set]]) -> Callable[[Any], tuple[set, set]]:
    found: dict[type, tuple[set, set]] = {}

    def specs(dofn: Any) -> tuple[set, set]:
        if type(dofn) not in found:
            found[type(dofn)] = real(dofn)
        return found[type(dofn)]

    return specs


def _by_types(real: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[tuple, Any] = {}

    def returned(f: Any, input_types: list, *args: Any, **kwargs: Any) -> Any:
        is_ours = isinstance(f, types.MethodType) and type(f.__self__).__module__.startswith(_OURS)
        if not is_ours or args or kwargs:
            return real(f, input_types, *args, **kwargs)
        key = (f.__func__, type(f.__self__), *input_types)
        if key not in found:
            found[key] = real(f, input_types)
        return found[key]

    return returned


def _by_flags(real: Callable[..., None]) -> Callable[..., None]:
    parsed: dict[tuple, dict[str, Any]] = {}

    def init(self: PipelineOptions, flags: Sequence[str] | None = None, **kwargs: Any) -> None:
        if flags is None or kwargs:
            real(self, flags, **kwargs)
            return
        key = (type(self), *flags)
        if key not in parsed:
            real(self, flags)
            parsed[key] = copy.deepcopy(vars(self))
        vars(self).update(copy.deepcopy(parsed[key]), _flags=flags)

    return init
