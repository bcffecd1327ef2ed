"""The artifact: how parts are encoded into one file and decoded from it.

Writing: a specification (``specs``) and float values give a part (``encode``, ``xor``), and ``artifact.write_artifact`` makes
the file. Reading: ``artifact.open_artifact``, then ``Artifact.delta`` for one parameter at a time.
"""
