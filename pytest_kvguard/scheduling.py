"""How cells are spread over xdist's workers. Imported only when xdist runs."""

from xdist.scheduler import LoadScopeScheduling


class CellScheduling(LoadScopeScheduling):
    """Send all items of a parametrized test to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("[")[0]
