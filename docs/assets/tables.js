// In tables code breaks between the words of a long name, and nowhere between the dashes of a flag and its name
for (const code of document.querySelectorAll(".md-typeset :not(pre) > code")) {
  if (code.children.length) continue
  const cell = code.closest("td, th")
  let text = code.innerHTML
  if (cell && text.length < 16) code.classList.add("whole")
  else if (cell) text = text.replace(/[_/:(](?=\w)|\.(?=[a-z])|=(?=["'\w]{6})/gi, "$&<wbr>")
  text = text.replace(/(^|\s)(--?[a-z]+)/gi, '$1<span class="whole">$2</span>')
  if (text !== code.innerHTML) code.innerHTML = text
}

// On narrow screens tables of four or more columns with sentences are stacked, and cells get their heads as labels
const filtered = document.querySelector("[data-filter]")
for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
  const heads = [...table.querySelectorAll("th")]
  const long = [...table.querySelectorAll("td:not(:first-child)")].some(cell => cell.textContent.length > 40)
  if (filtered) table.dataset.stacked = ""
  if (filtered || heads.length < 4 || !long) continue
  table.dataset.stacked = ""
  for (const row of table.querySelectorAll("tbody tr")) {
    for (const [index, cell] of [...row.cells].entries()) {
      if (!heads[index].textContent || !cell.textContent) continue
      const label = document.createElement("span")
      label.className = "label"
      label.append(...heads[index].cloneNode(true).childNodes, ": ")
      cell.prepend(label)
    }
  }
}
