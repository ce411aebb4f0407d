"""The methods: one file per method, which implements one paper. They need torch only."""
