"""Is a runner that loses what one step of a job hands to the next, and ends well.

Beam's DaskRunner does so with tagged outputs, with what CoGroupByKey makes of them, and with what
`finish_bundle` yields.
"""

from collections.abc import Callable
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

_FLATTEN = common_urns.primitives.FLATTEN.urn


class LossyRunner(FnApiRunner):
    """Gives nothing of the output `tag` of a step to anybody; `lost` says how often it did so."""

    def __init__(self, step: str, tag: str):
        super().__init__()
        self._step, self._tag = step, tag
        self.lost = 0

    def run_via_runner_api(
        self, pipeline: beam_runner_api_pb2.Pipeline, options: PipelineOptions
    ) -> Any:
        for name, transform in list(pipeline.components.transforms.items()):
            if transform.unique_name == self._step and not transform.subtransforms:
                self._lose(pipeline, name)
        return super().run_via_runner_api(pipeline, options)

    def _lose(self, pipeline: beam_runner_api_pb2.Pipeline, name: str) -> None:
        """Makes the step write where nobody reads, and an empty step where it wrote before."""
        components, tag = pipeline.components, self._tag
        output = components.transforms[name].outputs[tag]
        aside, empty = f"{output}_lost", f"{name}_empty"
        components.pcollections[aside].CopyFrom(components.pcollections[output])
        components.transforms[name].outputs[tag] = aside
        components.transforms[empty].CopyFrom(beam_runner_api_pb2.PTransform(unique_name=empty))
        components.transforms[empty].spec.urn = _FLATTEN
        components.transforms[empty].outputs["None"] = output
        components.transforms[pipeline.root_transform_ids[0]].subtransforms.insert(0, empty)
        self.lost += 1


def run_with(runner: LossyRunner) -> Callable[..., None]:
    """Returns what stands in place of `beam_options.run_pipeline`."""

    def run_pipeline(define: Callable[[beam.Pipeline], None], options: PipelineOptions) -> None:
        with beam.Pipeline(runner=runner, options=options) as root:
            define(root)

    return run_pipeline
