"""Files that start a run of several processes elsewhere: on TPU VMs, on GKE, under Slurm.

Each is a dataclass with `devices`, how many it has in all, and files(run), texts by name, ready to be run. A run that
ends with a fault is started again and goes on from its last checkpoint; one that is done, is not as it should be
configured, or was asked to stop is not (exit statuses 0, 2 and 75, see cli.py). WORKDIR must be on storage that all
processes share; the repository is expected in `folder` of every machine, or of the image.
"""
import dataclasses
import math
import shlex
import textwrap


@dataclasses.dataclass(frozen=True)
class Run:
  """An experiment, and the files and bindings that set it up."""
  experiment: str
  gin_files: tuple[str, ...]
  bindings: tuple[str, ...] = ()
  name: str = 'lmlib'  # of jobs and machines

  def __post_init__(self):
    if not self.gin_files:
      raise ValueError('Run.gin_files=() names no file')
    if not (self.name.replace('-', 'a').isalnum() and self.name == self.name.lower() and self.name[0].isalpha()
            and self.name[-1] != '-' and len(self.name) <= 40):
      raise ValueError(f'Run.name={self.name!r} must be of small letters, digits and inner hyphens, 40 at most')

  @property
  def command(self) -> str:
    """The command line, for a shell in the folder of the repository."""
    words = [f'--gin_file={name}' for name in self.gin_files]
    words += [f'--gin_bindings={binding}' for binding in self.bindings]
    return ' '.join(['python', '-u', f'experiments/{self.experiment}.py', *map(shlex.quote, words)])


@dataclasses.dataclass(frozen=True)
class Slurm:
  """`sbatch NAME.sbatch`. Each node has `per_node` processes and `gpus` GPUs in all."""
  nodes: int
  gpus: int = 8  # of a node
  per_node: int = 1
  partition: str | None = None
  account: str | None = None
  time: str = '24:00:00'
  restarts: int = 10
  setup: str = ''  # lines before the command, such as `module load cuda` and `source venv/bin/activate`
  folder: str = '.'

  def __post_init__(self):
    _counts(self, 'nodes', 'gpus', 'per_node', 'restarts')
    if self.gpus % self.per_node:
      raise ValueError(f'Slurm.gpus={self.gpus} are no multiple of Slurm.per_node={self.per_node} processes')

  @property
  def devices(self) -> int:
    return self.nodes * self.gpus

  def files(self, run: Run) -> dict[str, str]:
    wanted = {'job-name': run.name, 'nodes': self.nodes, 'ntasks-per-node': self.per_node, 'gpus-per-node': self.gpus,
              'time': self.time, 'partition': self.partition, 'account': self.account, 'output': f'{run.name}-%j.log'}
    lines = [f'#SBATCH --{name}={value}' for name, value in wanted.items() if value is not None]
    return {f'{run.name}.sbatch': '\n'.join([
        '#!/usr/bin/env bash', *lines,
        '#SBATCH --open-mode=append', '#SBATCH --requeue',
        '#SBATCH --signal=TERM@120  # two minutes before the time is over: all save, and the job is queued again', '',
        'set -u', f'cd {shlex.quote(self.folder)}', *filter(None, [self.setup.strip()]), '',
        f'for try in $(seq 0 {self.restarts}); do',
        '  # Of processes that do not end by themselves when one has, srun ends the others.',
        f'  srun --wait=60 --gpus-per-task={self.gpus // self.per_node} --signal=TERM@120 {run.command}',
        '  status=$?',
        '  case $status in',
        '    0 | 2) exit $status ;;',
        '    75) scontrol requeue "$SLURM_JOB_ID"; exit 75 ;;',
        '  esac',
        '  sleep $((try < 6 ? 1 << try : 60))',
        'done', 'exit $status', ''])}


@dataclasses.dataclass(frozen=True)
class TpuVm:
  """`bash NAME-create.sh`, then NAME-run.sh; NAME-stop.sh lets it save and stop, NAME-delete.sh ends the bill."""
  accelerator: str  # as gcloud names it, such as v5litepod-256
  zone: str
  version: str  # of the runtime, such as v2-alpha-tpuv5-lite
  devices: int
  project: str | None = None
  spot: bool = False
  restarts: int = 10
  setup: str = "pip install -q -e '.[tpu]'"
  folder: str = 'lmlib'

  def __post_init__(self):
    _counts(self, 'devices', 'restarts')

  def files(self, run: Run) -> dict[str, str]:
    where = f'--zone={shlex.quote(self.zone)}' + (f' --project={shlex.quote(self.project)}' if self.project else '')
    tpu = 'gcloud compute tpus tpu-vm'
    everywhere = lambda command: f'{tpu} ssh {run.name} {where} --worker=all --command={shlex.quote(command)}'
    head = '#!/usr/bin/env bash\nset -euo pipefail\n'
    spot = ' --spot' if self.spot else ''
    again = '\n'.join([
        f'cd {shlex.quote(self.folder)}', f'for try in $(seq 0 {self.restarts}); do', f'  {run.command}', '  status=$?',
        '  case $status in 0 | 2 | 75) exit $status ;; esac', '  sleep 10', 'done', 'exit $status'])
    stop = f"pkill -TERM -f 'python -u experiments/{run.experiment}[.]py'"
    return {
        f'{run.name}-create.sh': head + '\n'.join([
            f'{tpu} create {run.name} {where} --accelerator-type={shlex.quote(self.accelerator)} '
            f'--version={shlex.quote(self.version)}{spot}',
            f'{tpu} scp --recurse . {run.name}:{shlex.quote(self.folder)} {where} --worker=all',
            everywhere(f'cd {shlex.quote(self.folder)} && {self.setup}'), '']),
        f'{run.name}-run.sh': head + everywhere(again) + '\n',
        f'{run.name}-stop.sh': head + '# To one is enough: all agree on a step, save it and end with status 75.\n'
                               + everywhere(stop).replace('--worker=all', '--worker=0') + '\n',
        f'{run.name}-delete.sh': head + f'{tpu} delete {run.name} {where} --quiet\n'}


@dataclasses.dataclass(frozen=True)
class Gke:
  """`kubectl apply -f NAME.yaml`: a JobSet, of a job for each slice and a pod for each host, as XPK makes them."""
  image: str  # with the repository in `folder`, and what it needs
  accelerator: str  # cloud.google.com/gke-tpu-accelerator, such as tpu-v5-lite-podslice
  topology: str  # such as 16x16
  per_host: int = 4  # chips
  slices: int = 1
  restarts: int = 10
  spot: bool = False
  namespace: str = 'default'
  folder: str = '/lmlib'

  def __post_init__(self):
    _counts(self, 'per_host', 'slices', 'restarts')
    if not all(side.isdecimal() and int(side) for side in self.topology.split('x')):
      raise ValueError(f"Gke.topology={self.topology!r} must be such as '4x8' or '4x4x8'")
    if self._chips % self.per_host:
      raise ValueError(f'Gke.topology={self.topology!r} has {self._chips} chips, no multiple of '
                       f'Gke.per_host={self.per_host}')

  @property
  def _chips(self) -> int:
    return math.prod(map(int, self.topology.split('x')))

  @property
  def devices(self) -> int:
    return self.slices * self._chips

  def files(self, run: Run) -> dict[str, str]:
    hosts = self._chips // self.per_host
    command = textwrap.indent(f'cd {shlex.quote(self.folder)}\nexec {run.command}', ' ' * 18)
    spot = "\n              cloud.google.com/gke-spot: 'true'" if self.spot else ''
    return {f'{run.name}.yaml': f'''apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {run.name}
  namespace: {self.namespace}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {self.restarts}
    rules:
    - action: FailJobSet  # the configuration is at fault: the same would happen again
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: {self.slices}
    template:
      spec:
        completionMode: Indexed
        completions: {hosts}
        parallelism: {hosts}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {{containerName: run, operator: In, values: [2]}}
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            terminationGracePeriodSeconds: 120  # to save
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {self.accelerator}
              cloud.google.com/gke-tpu-topology: '{self.topology}'{spot}
            containers:
            - name: run
              image: {self.image}
              ports:
              - containerPort: 8471
              - containerPort: 8080
              command:
              - bash
              - -c
              - |
{command}
              resources:
                limits:
                  google.com/tpu: {self.per_host}
'''}


def check(where, layout):
  """ValueError if a layout does not fit the devices of a machine."""
  fixed = math.prod(size for size in layout.sizes if size > 0)
  if where.devices % fixed or (-1 not in layout.sizes and where.devices != fixed):
    raise ValueError(f'{layout} needs {"a multiple of " if -1 in layout.sizes else ""}{fixed} devices, and '
                     f'{type(where).__name__} has {where.devices}')


def _counts(config, *names: str):
  for name in names:
    value = getattr(config, name)
    if not isinstance(value, int) or value < (0 if name == 'restarts' else 1):
      raise ValueError(f'{type(config).__name__}.{name}={value!r} must be a positive number')
