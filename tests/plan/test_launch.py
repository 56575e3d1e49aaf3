"""The files that start a run elsewhere say what they should, and a shell or a YAML parser reads them."""
import shlex
import subprocess

import pytest
import yaml

from experiments import launch as verb
from lmlib import sharding
from lmlib.plan import launch

RUN = launch.Run('pretrain', ('quickstart.gin', 'meshes/fsdp.gin'), ("WORKDIR = '/shared/it is'", 'STEPS = 5'), 'run-1')
WORDS = ['python', '-u', 'experiments/pretrain.py', '--gin_file=quickstart.gin', '--gin_file=meshes/fsdp.gin',
         "--gin_bindings=WORKDIR = '/shared/it is'", '--gin_bindings=STEPS = 5']
TPU = launch.TpuVm('v5litepod-256', 'us-west4-a', 'v2-alpha-tpuv5-lite', 256, spot=True)


def checked(text: str) -> str:
  """A script that bash can read."""
  done = subprocess.run(['bash', '-n'], input=text, text=True, capture_output=True)
  assert (done.returncode, done.stderr) == (0, '')
  return text


def test_the_command_survives_a_shell():
  assert shlex.split(RUN.command) == WORDS


def test_slurm_starts_a_task_a_process_and_knows_what_statuses_mean(tmp_path):
  text = checked(launch.Slurm(4, 8, per_node=2, partition='gpu', restarts=3, setup='module load cuda').files(
      RUN)['run-1.sbatch'])
  said = {line for line in text.splitlines() if line.startswith('#SBATCH')}
  assert {'#SBATCH --nodes=4', '#SBATCH --ntasks-per-node=2', '#SBATCH --gpus-per-node=8',
          '#SBATCH --partition=gpu'} <= said
  assert 'account' not in text
  assert 'module load cuda' in text
  assert '--gpus-per-task=4' in text
  # As the batch node runs it, with a srun that ends with each of these in turn.
  for statuses, ended, tries, requeued in (([0], 0, 1, False), ([1, 2], 2, 2, False), ([75], 75, 1, True),
                                           ([1, 137, 1, 134, 0], 134, 4, False)):
    (tmp_path / 'statuses').write_text('\n'.join(map(str, statuses)) + '\n')
    (tmp_path / 'said').write_text('')
    fakes = ('srun() { echo srun "$@" >> said; s=$(head -1 statuses); sed -i 1d statuses; return $s; }\n'
             'sleep() { :; }\nmodule() { :; }\nscontrol() { echo scontrol "$@" >> said; }\nSLURM_JOB_ID=7\n')
    done = subprocess.run(['bash'], input=fakes + text, text=True, cwd=tmp_path, capture_output=True)
    log = (tmp_path / 'said').read_text()
    assert (done.returncode, log.count('srun '), 'scontrol requeue 7' in log) == (ended, tries, requeued), done.stderr


def test_tpu_vms_get_the_same_command_on_all_workers(tmp_path):
  files = {name: checked(text) for name, text in TPU.files(RUN).items()}
  assert files.keys() == {f'run-1-{verb}.sh' for verb in ('create', 'run', 'stop', 'delete')}
  assert '--accelerator-type=v5litepod-256' in files['run-1-create.sh']
  assert '--spot' in files['run-1-create.sh']
  # What gcloud would run over there.
  fake = 'gcloud() { for word in "$@"; do case $word in --command=*) echo "${word#--command=}";; esac; done; }\n'
  inner = subprocess.run(['bash'], input=fake + files['run-1-run.sh'], text=True, capture_output=True).stdout
  assert RUN.command in checked(inner)
  assert 'ssh run-1 --zone=us-west4-a --worker=all' in files['run-1-run.sh']
  assert '--worker=0' in files['run-1-stop.sh']
  assert 'experiments/pretrain[.]py' in files['run-1-stop.sh']


def test_a_jobset_has_a_pod_for_each_host():
  where = launch.Gke('registry/lmlib:1', 'tpu-v5-lite-podslice', '16x16', slices=2, spot=True)
  found = yaml.safe_load(where.files(RUN)['run-1.yaml'])
  assert (found['kind'], found['metadata']['name'], where.devices) == ('JobSet', 'run-1', 512)
  assert found['spec']['failurePolicy']['maxRestarts'] == 10
  job, = found['spec']['replicatedJobs']
  assert job['replicas'] == 2
  spec = job['template']['spec']
  assert (spec['completions'], spec['parallelism'], spec['completionMode'], spec['backoffLimit']) == (
      64, 64, 'Indexed', 0)
  assert spec['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2]
  pod = spec['template']['spec']
  assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
                                 'cloud.google.com/gke-tpu-topology': '16x16', 'cloud.google.com/gke-spot': 'true'}
  container, = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  *shell, script = container['command']
  assert shell == ['bash', '-c']
  assert checked(script) == f'cd /lmlib\nexec {RUN.command}\n'


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: launch.Run('pretrain', ()), r'gin_files=\(\)'),
    (lambda: launch.Run('sft', ('a.gin',), (), 'A b'), "name='A b'"),
    (lambda: launch.Slurm(2, 8, per_node=3), 'gpus=8 .*per_node=3'), (lambda: launch.Slurm(0), 'nodes=0'),
    (lambda: launch.Gke('i', 'a', '4xx4'), "topology='4xx4'"), (lambda: launch.Gke('i', 'a', '3x3'), '9 chips'),
    (lambda: launch.check(TPU, sharding.Layout(tensor=3)), 'multiple of 3 devices, and TpuVm has 256'),
    (lambda: launch.check(TPU, sharding.Layout(data=4)), 'needs 4 devices, and TpuVm has 256')])
def test_what_does_not_fit_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_verb_writes_the_files(tmp_path, capsys):
  verb.main(where=TPU, gin_files=('quickstart.gin',), name='quick', into=str(tmp_path / 'files'))
  assert sorted(path.name for path in (tmp_path / 'files').iterdir()) == [
      'quick-create.sh', 'quick-delete.sh', 'quick-run.sh', 'quick-stop.sh']
  assert 'experiments/pretrain.py --gin_file=quickstart.gin' in (tmp_path / 'files/quick-run.sh').read_text()
  assert len(capsys.readouterr().out.splitlines()) == 4
