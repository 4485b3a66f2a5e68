"""Process replay: what codegen emits for a corpus on one commit, and the difference on another.

    corpus.py    the models and pipelines
    record.py    emits them into a folder of plain text; also a script, run against another commit's package
    compare.py   two such folders: kernels added, removed, renamed and changed, equal changes shown once
    against.py   both sides of a comparison with a commit, each in a process of its own

Source: tinygrad's process replay (test/external/process_replay), which holds refactors to an empty difference.
"""
