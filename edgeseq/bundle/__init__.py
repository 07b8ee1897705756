"""The bundle: the plan a compiler writes, the file it becomes, and what can be counted from it.

plan.py       the typed plan, as a compiler builds it
format.py     the records of docs/bundle-format.md and their byte layouts
writer.py     plan -> model.edgeseq, weights streamed
reader.py     model.edgeseq -> plan, every defect refused with its own sentence
ledger.py     plan -> bytes per token
directory.py  the bundle directory: written under a temporary name, renamed, never half there
"""
