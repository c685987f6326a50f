"""A real vLLM engine for tests and benchmarks: small models with random weights, and an engine in processes of its own.

``client`` and ``models`` run where shmcache runs; ``serve`` is run by the Python that has vLLM.
"""
