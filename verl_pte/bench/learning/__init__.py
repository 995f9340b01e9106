"""Does PTE give back what a window loses? Small models on generated tasks, trained through this package's own parts."""
