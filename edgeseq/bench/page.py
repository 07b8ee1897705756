"""The report's page, a jinja2 template."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2529; background: #fff; margin: 2.5rem auto; max-width: 62rem;
       padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .note { color: #5b666d; font-size: .9rem; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .28rem .7rem .28rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
td.n, th.n { text-align: right; } td.w { white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid #8a949b; font-weight: 600; } tbody tr + tr td { border-top: 1px solid #edf0f2; }
.ok { color: #2d7a34; } .bad { color: #b3261e; font-weight: 600; }
code { font-size: .88rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for c in crossovers %}
<p>{{ c.model_filename.split('/')[-1] }} is faster than {{ c.rival_filename.split('/')[-1] }}
{% if c.measured_depth is none %}at no depth up to {{ c.depths | max }} tokens{% elif c.measured_is == 'at most' %}
already at the smallest depth measured, {{ c.measured_depth }} tokens{% else %}from a depth of {{ c.measured_depth }}
tokens{% endif %}; by the bytes they move it should be
{% if c.predicted_depth is none %}never{% else %}from {{ c.predicted_depth }}{% endif %}.</p>
{% endfor %}
{% for r in ratios %}
<p>{{ r.case }}: {{ r.ratio | number }} times {{ r.against }} on the same weights.</p>
{% endfor %}

{% if depth_figure %}
<h2>Tokens per second against depth</h2>
<div class="scroll">{{ depth_figure | safe }}</div>
<p class="note">Medians with the middle half of the repetitions. Dashed: the most that the bandwidth measured
in this run allows for the bytes that a token moves. A recurrent state does not grow, a cache does.</p>
{% endif %}
{% if ledger_figure %}
<h2>What one token moves</h2>
<div class="scroll">{{ ledger_figure | safe }}</div>
<p class="note">Counted from the plan, not measured. A prompt reads its weights once per chunk, so a token of it
moves less.</p>
{% endif %}

<h2>Tests</h2>
<div class="scroll"><table>
<thead><tr><th>contender</th><th>test</th><th class="n">tokens/s</th><th class="n">±</th>
<th class="n">first token ms</th><th class="n">p50 ms</th><th class="n">p99 ms</th>
<th class="n">MB/token</th><th class="n">GB/s</th>
<th class="n">of roof</th><th class="n">state kB</th><th class="n">peak MB</th><th class="n">J/token</th></tr></thead>
<tbody>
{% for r in rows %}
<tr><td>{{ r.contender }}</td><td>{{ r.test }}{{ '*' if r.depth_by == 'state' }}</td>
<td class="n">{{ r.median_ts | number }}</td><td class="n">{{ r.stddev_ts | number }}</td>
<td class="n">{{ r.ttft_ms | number }}</td><td class="n">{{ r.p50_ms | number }}</td>
<td class="n">{{ r.p99_ms | number }}</td>
<td class="n">{{ (r.bytes_per_token / 1e6 if r.bytes_per_token else none) | number }}</td>
<td class="n">{{ r.achieved_gbs | number }}</td>
<td class="n">{% if r.roof_fraction is none %}–{% else %}{{ '%.0f' % (100 * r.roof_fraction) }} %
{{- ' c' if r.roof == 'cache' }}{% endif %}</td>
<td class="n">{{ (r.state_bytes / 1e3 if r.state_bytes is not none else none) | number }}</td>
<td class="n">{{ (r.peak_rss_bytes / 1e6 if r.peak_rss_bytes else none) | number }}</td>
<td class="n">{{ r.joules_per_token | number }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">ppN reads a prompt of N tokens, tgN makes N, @ dN after N others. Medians; ± is one standard deviation.
The roof is the rate at which the same threads read memory in the same run.
{% if cached %}
c: what a token touches fits the last cache, so the roof is reading the weights from there.
{% endif %}
{% if made_up %}
*: the depth was reached by loading a made-up state, since reading so much would take long.
{% endif %}</p>

<h2>Checked before timing</h2>
{% for report in reports %}
<div class="scroll"><table>
<thead><tr><th>{{ report.path.split('/')[-1] }}</th><th>compared with</th><th class="n">worst difference</th>
<th class="n">tolerance</th><th>where</th><th></th></tr></thead>
<tbody>
{% for s in report.stages %}
<tr><td>{{ s.name }}</td><td>{{ s.against }}</td>
<td class="n">{{ s.worst | number if s.worst is not none }}</td>
<td class="n">{{ s.tolerance | number if s.tolerance is not none }}</td>
<td class="w">{{ s.where }} {{ s.note }}</td>
<td class="{{ 'ok' if s.ok else 'bad' }}">{{ 'ok' if s.ok else 'failed' }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>There was no golden to check against.</p>
{% endfor %}

<h2>Facts</h2>
<table><tbody>
{% for name, value in facts.items() %}
<tr><td>{{ name }}</td>
<td class="w">{% if name == 'Command' %}<code>{{ value }}</code>{% else %}{{ value }}{% endif %}</td></tr>
{% endfor %}
</tbody></table>
</body>
</html>
"""
