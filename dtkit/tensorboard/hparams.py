"""The recipe in TensorBoard's HParams tab: its three summaries, made without TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
    Status,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["beginning", "ending"]

# Any: protocol buffers, and settings as JSON.


def beginning(
    settings: dict[str, Any], start_unix_s: float, metric_tags: Iterable[str]
) -> tuple[Any, Any]:
    """Return the values that open a run: which settings there are, and those of this run."""
    start = SessionStartInfo(start_time_secs=start_unix_s)
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = "–" if value is None else str(value)
    experiment = Experiment(
        hparam_infos=[HParamInfo(name=name) for name in settings],
        metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in metric_tags],
    )
    return (
        _value(metadata.EXPERIMENT_TAG, experiment=experiment),
        _value(metadata.SESSION_START_INFO_TAG, session_start_info=start),
    )


def ending(state: str, end_unix_s: float) -> Any:
    """Return the value that closes a run."""
    name = "STATUS_FAILURE" if state == "failed" else "STATUS_SUCCESS"
    end = SessionEndInfo(status=Status.Value(name), end_time_secs=end_unix_s)
    return _value(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _value(tag: str, **content: Any) -> Any:
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
    )
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
