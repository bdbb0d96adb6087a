"""The graph operators against their rivals and against the physical floor."""
