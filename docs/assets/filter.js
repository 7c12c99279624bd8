// A box on pages with <div data-filter="what to type">: it shows the rows of tables that hold all its words.
for (const place of document.querySelectorAll("[data-filter]")) {
  const box = document.createElement("input")
  const found = document.createElement("output")
  box.type = "search"
  box.placeholder = `Filter: ${place.dataset.filter}`
  box.setAttribute("aria-label", box.placeholder)
  place.append(box, found)

  // Each table with the headings that stand directly before it
  const parts = []
  let headings = []
  for (const node of place.parentElement.querySelectorAll("h2, h3, h4, table")) {
    if (node.tagName !== "TABLE") {
      headings = headings.filter(heading => heading.tagName < node.tagName)
      headings.push(node)
    } else {
      parts.push({ headings: [...headings], table: node, rows: [...node.querySelectorAll("tbody tr")] })
    }
  }

  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
    const shown = new Set()
    let count = 0
    for (const { headings, table, rows } of parts) {
      let any = false
      for (const row of rows) {
        const text = row.textContent.toLowerCase()
        row.hidden = !words.every(word => text.includes(word))
        if (!row.hidden) count += 1, any = true
      }
      table.hidden = !any
      if (any) headings.forEach(heading => shown.add(heading))
    }
    for (const { headings } of parts) for (const heading of headings) heading.hidden = !shown.has(heading)
    found.textContent = words.length ? `${count} ${count === 1 ? "row" : "rows"}` : ""
  })
}
