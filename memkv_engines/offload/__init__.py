"""Jobs, staging and pipelines between paged memory and a tier; engine-independent."""
