"""The steps of pipeline.py on Apache Beam: in this process, or on a cluster of Dataflow, Flink or Spark.

A task leaves its result in the work folder, so Beam carries tasks out and sizes back, and nothing else. The
work folder, and what tasks read and write, must be reached under the same names by every worker.
"""
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json

from lmlib.data.folder import Folder

FAILED = 'failed'  # the key of the first fault that a task found in what the user gave


@dataclasses.dataclass(frozen=True)
class Beam:
  """An engine. options: as on Beam's command line, ('--project=p', '--temp_location=gs://bucket/t')."""
  runner: str = 'DirectRunner'
  options: tuple[str, ...] = ()

  @contextlib.contextmanager
  def started(self, folder: Folder) -> Iterator[Callable]:
    """Inside, over(function, tasks) yields what function(task) returns for every task, when all are done."""
    try:
      import apache_beam as beam
      from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
      raise ValueError(f"Beam.runner={self.runner!r} needs Apache Beam: pip install 'lmlib[beam]'") from error
    if self.runner != 'DirectRunner' and folder.local is None and folder.spec['driver'] == 'memory':
      raise ValueError(f'Beam.runner={self.runner!r} cannot reach {folder}, which is memory of this process')

    def over(function, tasks):
      folder.delete(FAILED)
      try:
        with beam.Pipeline(self.runner, options=PipelineOptions(list(self.options))) as pipeline:
          _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(_told, function, str(folder))
      except Exception as error:
        if (found := folder.get(FAILED)) is None:
          raise
        kind, message = json.loads(found)
        raise {'OSError': OSError}.get(kind, ValueError)(message) from error
      return [0] * len(tasks)

    yield over


def _told(task, function, folder: str) -> int:
  """function(task); a fault that is the user's to know is left in the folder, since runners wrap errors."""
  try:
    return function(task)
  except (ValueError, OSError) as error:
    kind = 'OSError' if isinstance(error, OSError) else 'ValueError'
    Folder(folder).put(FAILED, json.dumps([kind, str(error)]).encode())
    raise
