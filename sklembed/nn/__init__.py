"""Pure torch: modules and losses that know nothing of estimators."""
