"""A new process that opens a registry and searches once, for the registry benchmark: ``... <database> <index>``.

Nothing is imported above but what an interpreter has loaded already, so that imports can be timed.
"""

import json
import sys
from time import perf_counter


def main() -> None:
    start = perf_counter()
    from benchmarks._registry_data import ENCODER, clustered
    from lora_hub_sdk.registry.registry import Registry
    from lora_hub_sdk.types import AdapterFilter

    database, index = sys.argv[1:]
    query = list(clustered(1, samples=1, seed=3))
    imported = perf_counter()
    registry = Registry(database, index=index, encoder=lambda: ENCODER)
    opened = perf_counter()
    (hits,) = registry.search(query, 3, AdapterFilter())
    searched = perf_counter()
    registry.close()
    print(
        json.dumps(
            {
                "import_s": imported - start,
                "open_s": opened - imported,
                "first_search_s": searched - opened,
                "hits": [hit.adapter.name for hit in hits],
            }
        )
    )


if __name__ == "__main__":
    main()
