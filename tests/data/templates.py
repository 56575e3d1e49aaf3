"""Chat templates in the manner of well-known models, written for these tests."""

CHATML = '''{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}'''

LLAMA3 = '''{% for message in messages %}
{% set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
{% set content = head + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}'''

MISTRAL = '''{% if messages[0]['role'] == 'system' %}
{% set start = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}
{% else %}
{% set start = '' %}{% set turns = messages %}
{% endif %}
{{- bos_token }}
{%- for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}
{{- '[INST] ' + (start if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{% endfor %}'''

ZEPHYR = '''{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}'''

ALL = {'chatml': CHATML, 'llama3': LLAMA3, 'mistral': MISTRAL, 'zephyr': ZEPHYR}
SPECIALS = ('<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')
END = {'chatml': '<|im_end|>', 'llama3': '<|eot_id|>', 'mistral': '<eos>', 'zephyr': '<eos>'}
