"""Greedy tokens after a prompt of token ids: python3 example.py 1,2,3 16"""

import sys

import edgeseq_model

with edgeseq_model.load() as model, model.session() as session:
    session.prefill([int(word) for word in sys.argv[1].split(",")])
    tokens = session.generate(int(sys.argv[2]))
    print(",".join(str(int(token)) for token in tokens))
