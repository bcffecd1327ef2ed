"""All that knows transformers' continuous batching: subclasses that add variants, own sampling and supervision.

The batching library is private and moves fast, so it is pinned, its signatures are checked before anything is replaced,
and its types stay in this folder. What is replaced, and why: attention (a dense mask over the whole batch is several
times slower), sampling (there it is one setting for all), the prefix hash (it knows no variants, so one would continue
another's cache), and the thread (one exception ends it for good). On a GPU with flash attention, the library's
attention and its CUDA graphs of decoding steps stay: tables that a graph reads are written before it is replayed, and
tokens are chosen after. No batches are prepared ahead.
"""

from deltaserve.server.engine.continuous_batching.library import check

check()
