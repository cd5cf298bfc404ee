// Search excerpts are fetched from the pages, which browsers refuse when the site is opened as a file: no excerpts then.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
