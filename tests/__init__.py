"""fastdpo's tests; a package, so that helpers import as tests.tiny and nothing is shadowed."""
