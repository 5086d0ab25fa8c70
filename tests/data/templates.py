"""Chat templates of the kinds that models come with, written short, and what each writes around an answer."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_GENERATION_BRANCH = CHATML.partition("{% if add")[0]
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] "
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = INSTRUCT.replace("INST", "I").replace(
    " {{ m.content.strip() }} {{ eos_token }}", "{{ m.content }}{{ eos_token }}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<|im_start|>{{ role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DATED = (
    "{{ bos_token }}<|im_start|>system\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
    "{{ messages[0].content }}<|im_end|>{% for m in messages[1:] %}"
    "<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
THINK_BLOCK = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|im_start|>assistant\n<think>\n"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    "{% endif %}{{ '\n' }}"
    "</think>\n\n{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>"
    "\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTS_CUT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|a|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}<|u|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|a|><think>\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content[0].text }}"
    "{% else %}{{ m.content.strip() }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWICE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}\nAgain: {{ m.content }}\nA "
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)

CHAT_TEMPLATES = {
    "chatml": CHATML,
    "no generation branch": NO_GENERATION_BRANCH,
    "instruct": INSTRUCT,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "dated": DATED,
    "think block": THINK_BLOCK,
    "thoughts cut": THOUGHTS_CUT,
    "parts": PARTS,
    "user parts": USER_PARTS,
    "twice": TWICE,
}
