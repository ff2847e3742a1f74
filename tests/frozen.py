"""The last module that the fork server imports: what the others hold is no garbage, and the
processes that it forks need not look for any there, at each of their collections.
"""

import gc

gc.collect()
gc.freeze()
