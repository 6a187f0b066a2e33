// Small repairs of the theme for readers who use a keyboard or a screen reader.

// What a button shows and what it is called should agree; an icon says nothing.
document.querySelectorAll(".theme-switch").forEach((icon) => {
  icon.removeAttribute("title");
  icon.querySelectorAll("title").forEach((title) => title.remove());
});
document.querySelectorAll("summary[aria-label]").forEach((summary) => summary.removeAttribute("aria-label"));
document.querySelectorAll("button.search-button-field").forEach((button) => button.removeAttribute("aria-label"));

// The sidebar is a landmark.
document.querySelectorAll(".bd-sidebar-primary").forEach((sidebar) => {
  sidebar.setAttribute("role", "complementary");
  sidebar.setAttribute("aria-label", "Book");
});

// Code and output that scroll sideways can be reached with the tab key.
document.querySelectorAll("div.highlight pre, div.cell_output pre, .pst-scrollable-table-container").forEach((box) => {
  box.tabIndex = 0;
});

// The reference list has roles that no longer exist.
document.querySelectorAll(".citation-list [role='doc-biblioentry']").forEach((entry) => {
  entry.setAttribute("role", "listitem");
});
