"""A run whose data do not come any more ends in a real process, and goes on later."""
import json


def test_a_run_that_waits_for_ever_ends_with_all_stacks_and_one_last_line(command):
  command.environment = command.environment | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  text = command.gin.read_text()
  command.gin.write_text(text + ('from tests.experiments import faulty\nfrom lmlib.train import hang\n'
                                 'from lmlib.train import watch\n'
                                 'pretrain.main.packing = @faulty.Stuck()\nfaulty.Stuck.row = 80\n'
                                 'pretrain.main.watch = @watch.Watch()\nwatch.Watch.hang = @hang.Hang()\n'
                                 'hang.Hang.least = 1.0\n'))
  status, out, err = command.run('STEPS = 24')
  assert status == 1, (out, err)
  *stacks, last = err.splitlines()
  assert last.startswith('step 20 hangs: nothing has moved for 1 s, where the median step takes 0.')
  assert last.endswith(f'the stacks of all threads are in {command.workdir}/stacks_0.txt; run the same command to go '
                       'on from the last checkpoint')
  for place in ('faulty.py', 'loader.py', 'loop.py'):  # what waits, for whom, and what waits for that
    assert any(place in line for line in stacks)
    assert place in (command.workdir / 'stacks_0.txt').read_text()
  assert (command.last_step(), command.checkpoints()) == (19, [7, 14])
  command.gin.write_text(command.gin.read_text().replace('faulty.Stuck.row = 80', 'faulty.Stuck.row = 10000'))
  manifest = command.workdir / 'manifest.json'  # it is the same run with the fault mended
  facts = json.loads(manifest.read_text())
  facts['identity']['packing.row'] = 10000
  manifest.write_text(json.dumps(facts))
  status, out, err = command.run('STEPS = 24')
  assert (status, err) == (0, '')
  assert 'going on after step 14 of 24' in out
  spent = json.loads((command.workdir / 'report/summary.json').read_text())['seconds_by_cause']
  assert spent['lost'] > 0
  assert spent['other'] < 0.1 * sum(spent.values())
