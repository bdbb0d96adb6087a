"""The operators, one file each: schemas, shapes of results, derivatives, batching rules, and the public function."""
