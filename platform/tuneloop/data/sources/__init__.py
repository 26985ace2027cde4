"""Where rows come from: files, folders and the Hub, read into conversations or documents."""
